"""Failover: the cluster is read twice a second, `godwit.cluster` decides, and it is carried out.

reading     records at one revision, and what the hosts' agents say that they run
placing     where a VM goes, by the rules that every placement follows
acting      fences, swaps, starts: what a decision asks for
telling     notes and alarms, each told once
controller  the loop
"""
