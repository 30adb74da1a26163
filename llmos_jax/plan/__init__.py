"""Plans: what a configuration's programs take on a target, what would make them fit, and which mesh is best."""
