"""The web page: everything without a terminal.

options      what ``halfbyte ui`` takes
server       from the start to the end: port, page, downloads
guard        who may ask: hosts, origins, passwords; what a browser may load
page         the page, made of a module for each station: start, train, chat, running, ship
station      what all stations share
texts        what the page says, in English and Chinese, a file each
pictures     what is drawn: HTML and SVG, every text escaped
places       the folders that it may read and write
uploads      what a browser sent, kept as long as it is of use
found        models and runs on this machine
asked        what stands in the page, as options of a run
jobs         what it starts: processes that outlive it, one after the other (job_process)
questions    what takes time or memory: previews of data, plans; in a process of its own (worker)
chatting     answers, from halfbyte's own server in another process (attached)
"""
