"""``halfbyte serve``: OpenAI's HTTP API over the engine (:mod:`halfbyte.generate.engine`), by FastAPI and uvicorn.

A request takes this way, and each part is a file:

    guard          its key, its host, its line in the log, and an answer for whatever goes wrong
    app            which function answers which path
    wire           the body: read within limits, strict JSON
    schemas        what it may say, by pydantic
    catalog        the model that it names: the base, or an adapter over it, loaded and unloaded at run time
    prompts        messages or texts as tokens; tools: the calls of functions in an answer
    service        what a request may ask, handed to the engine
    answering      the engine's streams, and a client that hangs up
    chat, completions, embeddings   the forms of the answers
    errors         the form of errors
    options, metrics, log, running   what was asked for at the start, what is counted, from the start to the end

Importing this package, and :mod:`halfbyte.deploy.serve.options`, imports neither torch nor FastAPI.
"""
