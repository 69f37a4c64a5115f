"""The engine model: the SimPy shell of the policy core, and one in which nothing takes time."""
