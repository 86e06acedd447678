"""A root file system that lies somewhere on this computer, as the disk of a guest.

    tree        files of an archive, one layer over the other
    source      a folder, a tar archive or an OCI image layout, as one archive
    image       that archive as an image in the cache, unpacked in a VM

Source: tar(5); the OCI Image Format Specification, "Image Layout" and "Image Layer Filesystem
Changeset".
"""
