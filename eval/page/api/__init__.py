"""The HTTP API beside the page, in the form of OpenAI's image edits.

routes serves; it reads a request with body and wanted, and answers errors as refusals says.
"""
