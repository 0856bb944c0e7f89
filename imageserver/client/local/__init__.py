# SPDX-License-Identifier: Apache-2.0
"""An image on this side; also a server's control socket and its transfer files.

    formats                        raw or qcow2, behind one interface
    qcow2  qcow2_check             an image served by a private qemu-nbd; is it whole?
    raw  qcow2_chain               a file; an image with all files that it names
    qcow2_header  qemu_programs
    files                          opening, renaming, the system's errors

Every file is opened once, and what is opened is checked: a name may lead elsewhere next time.
"""
