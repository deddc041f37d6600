"""What the neurons know of the chain: who is on the subnet, how weights are set, and where a neuron can be reached.

``base`` says what a chain can do, ``errors`` how it refuses, ``sdk`` is the chain behind Bittensor's SDK. ``memory`` is
a chain without a node, ``substrate`` puts it beneath the SDK's own client, ``server`` lets processes share it.
"""
