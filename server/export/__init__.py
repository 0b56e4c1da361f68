"""A run's model as a Hugging Face folder: what `moonflower export` and `moonflower run export` write."""
