"""What an adapter is good for: edits, tables of edits, scores, reports, the page. The files here are the commands.

Rooms, from the top: page; report; exports; scores; tables; bases; qwen; request. Imports train, data_prep and losses.
"""
