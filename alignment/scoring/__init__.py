"""Score models, the scorer service and its client."""
