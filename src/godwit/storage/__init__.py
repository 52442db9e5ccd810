"""Storage: formats and images, and the broker that stands between a VM and its images."""
