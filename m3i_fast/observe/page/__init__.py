"""The parts of the report page: its inputs, pictures, figures, sentences, template and style."""
