"""The public REST API: one door for the command line, the SDK, the console and scripts."""
