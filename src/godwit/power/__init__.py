"""Power devices of hosts: Redfish, IPMI, fence-agents. On, off, state, and proof of it.

device    what a power device is to the rest of the house; what to do next (pure); proof
redfish   a Redfish service over HTTPS, its certificate pinned
ipmi      ipmitool
agents    fence-agents
vault     passwords, sealed by a key that is not in the store
choose    from a host's record to its device
"""
