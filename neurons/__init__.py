"""The subnet's neurons, installed as `condense_core.neurons`: miners sell compression, validators measure and pay it.

Everything about compression lives in `condense_core`; what is here knows who asks, who answers, and what an answer is
worth. Nothing is imported here.
"""
