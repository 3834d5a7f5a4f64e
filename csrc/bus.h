// What happens when memory that is a view of a file cannot be read any more: the file has become shorter, or its disk
// is gone. The system then sends SIGBUS to whoever touches it, and a process that says nothing ends without a word.

#pragma once

namespace halfbyte {

// From now on write `text`, which is copied, to the standard error output and end the process with this code.
void tell_bus_error(const char* text, int code);

}  // namespace halfbyte
