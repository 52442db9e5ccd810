"""The command line: a thin face on ``godwit.client``. One binary, noun then verb.

``main`` holds the nouns and how errors end; ``act`` the verbs that change something, built from
``godwit.model.words``; ``show`` the ones that only look. Every import that a command may not need
is made inside a function: ``godwit --help`` and lists have to be quick.
"""
