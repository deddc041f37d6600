"""A whole subnet on one computer, of real processes: chain, miners, validators and a gateway."""
