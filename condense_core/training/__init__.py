"""Training: the recipe for the embedded model, the compressor trainer, their data and losses."""
