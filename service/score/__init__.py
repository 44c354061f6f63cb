"""From a served forecast to what it was worth."""
