"""What people have -> dataset files. A builder is a module, or a folder with a module `command`; `common` is what they share.

Imports data_prep/cli, data_prep/jobs and data_prep/rows; a builder may use another.
"""
