"""What a frozen encoder has learned: neighbours, linear probe, retrieval, features as colour."""
