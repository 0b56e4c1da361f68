"""What a model is used for once it is exported: `moonflower predict` and `moonflower explain`. They need no run and no database."""
