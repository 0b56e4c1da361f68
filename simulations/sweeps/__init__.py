"""Studies: one scenario under many settings and seeds, a run each, in processes of their own."""
