"""The web page: `layout.build_page` puts it together, `eval/app.py` serves it. Importing starts nothing.

Imports eval/report, eval/qwen and eval/request.
"""
