"""Pages and pictures of evaluations, made from their JSON files without data or model."""
