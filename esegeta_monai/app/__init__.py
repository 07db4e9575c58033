"""The local app: a page on which a click on a voxel asks the network why.

    security.py   session, checks of each request, headers
    questions.py  a question of the page as text of methods and targets
    process.py    the worker process: jobs, progress, cancel, restart
    view.py       a case for the report's viewer
    server.py     the HTTP server
    page.html, view.html, app.js, network.js, app.css

The worker (`esegeta_monai.cli.app_worker`) holds the network and runs the command line's own functions. The server
holds no network: it reads files that the worker has written.
"""
