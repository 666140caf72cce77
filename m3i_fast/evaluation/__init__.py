"""What a frozen encoder has learned: categories, captions, places, features as colour."""
