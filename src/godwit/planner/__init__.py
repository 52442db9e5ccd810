"""Plans over the whole cluster, all of them pure: where a VM goes, which move may go next, how a
host is emptied. Facts in, a plan and its reasons in words out; nothing here asks or acts.
"""
