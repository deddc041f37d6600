"""What a miner is made of: who may ask it, what compresses for it, and the application around both."""
