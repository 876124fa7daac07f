"""Programs that others wrote, at our address."""
