"""Topic: predicted against measured, from what the other topics stored."""
