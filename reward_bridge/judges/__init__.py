"""Who compares two pictures in the arena: an endpoint, a person, a reward."""
