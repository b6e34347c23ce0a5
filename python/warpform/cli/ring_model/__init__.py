"""`python -m warpform ring-model`: how long ring attention over N ranks takes, by a model of measured numbers."""
