"""The web page: `page.build_page` puts it together, `eval/app.py` serves it. Importing starts nothing."""
