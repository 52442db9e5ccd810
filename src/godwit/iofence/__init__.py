"""The daemon of a storage server that shuts a lost host out, and says when that is certain.

settings   what the administrator says: places, and where each host comes from
cuts       the durable list of who is shut out
servers    what a kind of server has to be able to do, and what is common to all
tgt        iSCSI targets of tgtd
ganesha    NFS exports of nfs-ganesha
fence      one place at a time: write down, carry out, read back
app        what managers ask over mutual TLS
"""
