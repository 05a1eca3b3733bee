"""Training for sharing: what the trunk and the branches of a group learn.

For t at or above t* (the trunk) the model learns the mixture of a group under the mean of its members' conditions, below t* (the
branches) each member under its own. Modules are imported by name, `from sage.training import losses`; importing this loads nothing.
"""
