"""Pages and pictures of what evaluations measured: reads their JSON, knows neither data nor model."""
