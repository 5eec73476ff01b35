"""Data: corpora as token files, and data sets of examples for contrastive learning.

Text:     text.py loads a corpus as token ids. It uses tokenizer.py, download.py, pydocs.py
          (a corpus that needs no network) and, for a corpus larger than memory, sources.py (what
          is held out), documents.py (reading) and shards.py (token files).
Examples: examples.py describes a data set of text, images and sounds. scenes.py generates one.
          caption_dataset.py reads one from a folder: caption_forms.py finds its captions (table.py
          in tables with a header), captions.py chooses what is held out. emoji.py has drawings and,
          by speech.py, spoken names. check.py shows a data set before training. sound.py has
          waveforms and spectrograms.
Both:     random_bits.py has random numbers that depend on their key alone. lock.py keeps two
          processes from writing the same file. splits.py knows the names of splits, file_types.py
          the first bytes of files.
"""
