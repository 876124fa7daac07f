"""What a server does under load."""
