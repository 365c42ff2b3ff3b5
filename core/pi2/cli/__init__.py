"""The command line.  stdout carries generated text or data, everything else goes to stderr.

One module per command; what a command needs is imported when it runs, so that ``pi2 --help`` is quick.
"""
