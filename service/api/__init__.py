"""What a caller sees."""
