"""How a validator finds out what an answer is worth: challenges that look like any request, and the LLM that reads."""
