"""A service in several processes: one or more answer HTTP, another holds the models."""
