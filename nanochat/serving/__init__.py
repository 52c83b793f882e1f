"""Chatting over HTTP; the model runs in batching.py, one folder up.

| file | what it is |
|---|---|
| `server.py` | the door and the routes |
| `api.py` | what a request may hold |
| `answers.py` | what a client reads, while it is generated |
| `page.py` | the chat page's files (`ui.html`, `ui/`) |
| `markdown.py` | answers as trees, from which the page builds its elements |
"""
