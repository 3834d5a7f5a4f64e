"""The web page: everything without a terminal.

options    what ``halfbyte ui`` takes
texts      what the page says, in English and Chinese, a file each
places     the folders that it may read and write
jobs       what it starts: processes that outlive it, one after the other
found      models and runs on this machine
worker     what takes time or memory: previews of data, plans; in a process of its own
chatting   answers, from halfbyte's own server in another process
guard      who may ask: hosts, origins, passwords; what a browser may load
pictures   what is drawn: HTML and SVG, every text escaped
page       the page, of a module for each station
"""
