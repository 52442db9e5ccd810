"""Identities, TLS, HTTPS and SSE between daemons, and the clock offset between hosts.

Import the module you need (`godwit.wire.http`, `godwit.wire.server`, ...): this package
imports nothing by itself, so that the command line never pays for a server or a CA.
"""
