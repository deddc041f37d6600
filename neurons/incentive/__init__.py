"""What an answer is worth: pure functions of what was measured, without network, chain or model."""
