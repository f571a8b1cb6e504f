"""What --help of infini-data and its commands says, and their examples."""

ABOUT = """\
Turn text into the shards that infini-train reads.

  1. infini-data tokenizer books/ --out tokenizer.model --vocab-size 16000
  2. infini-data encode books/ --tokenizer tokenizer.model --out data/books --holdout 0.05
  3. infini-data inspect data/books/train

Then infini-train train CONFIG, where data.train and data.validation name the two folders and model.vocab_size is 16000.

Sources are text files, JSON lines, Parquet files, WebDataset tars (of text or of token ids), the .bin files of
Megatron's preprocess_data; folders (searched for all of these except .bin and hidden files); patterns such as
'web/*.jsonl.zst' and 'web/corpus-{000..999}.tar'; URLs that fsspec opens (s3://...); 'pipe:PROGRAM ARGUMENTS', whose
output is read as a tar; and - for standard input. A text file is one document; so is a line, a row, a sample of a tar.
Text, JSON lines and tars may be compressed: .gz .zst .xz .bz2."""

TOKENIZER = """\
Train a SentencePiece tokenizer on a sample of the sources. It decodes to exactly the text it encoded: nothing is
normalised, white space is kept, and unknown characters are spelled in bytes. Ids: unk 0, bos 1, eos 2, pad 3."""
TOKENIZER_EXAMPLES = """\
examples:
  infini-data tokenizer books/ --out tokenizer.model --vocab-size 16000
  infini-data tokenizer wiki.jsonl.zst code/ --out t.model --kind unigram --sample-mb 500"""

CLEAN = """\
Write the documents that pass, as JSON lines, in order, with a report of what was changed and left out. Long documents
stay whole. Rerun the command to resume a run that was stopped or killed."""
CLEAN_EXAMPLES = """\
examples:
  infini-data clean web/ --out clean --nfc --strip-controls --min-chars 200 --max-symbols 0.3 --dedup
  infini-data clean web/ --out clean --language en,de --near-dedup 0.8"""

NEAR_DEDUP = """\
Leave out near duplicates of a corpus that outgrows one machine: the MinHash steps of datatrove, on this machine or as
Slurm jobs. Texts that share --threshold of their 5-word shingles are one cluster, of which one stays. Filter with
clean first; clean --near-dedup does the same for what one machine can read. On Slurm the first call submits the jobs;
rerun the command when they have ended to put their results together."""
NEAR_DEDUP_EXAMPLES = """\
examples:
  infini-data near-dedup clean/ --out unique --workers 8
  infini-data near-dedup clean/ --out unique --slurm cpu --time 4:00:00 --sbatch account=text"""

FERTILITY = """\
Print how many bytes of text a token stands for, and whether decoding returns the text. Use text that the tokenizer was
not trained on."""
FERTILITY_EXAMPLES = """\
examples:
  infini-data fertility held-out/ --tokenizer tokenizer.model --tokenizer llama/tokenizer.json"""

ENCODE = """\
Encode the sources into a folder of WebDataset shards with an index, a manifest, and the tokenizer. The folder appears
whole at the end. Rerun the command to resume a run that was stopped or killed. The result does not depend on the number
of workers or parts."""
ENCODE_EXAMPLES = """\
examples:
  infini-data encode books/ --tokenizer tokenizer.model --out data/books --holdout 0.05
      writes data/books/train and data/books/validation (whole documents, chosen by their ids)
  infini-data encode notes.txt --tokenizer byte --out data/notes
      needs no trained tokenizer: one token per byte
  infini-data encode dump.parquet --text-field content --id-field url --tokenizer t.model --out data/dump
  infini-data encode booksum.jsonl --text-field book --summary-field summary --tokenizer t.model --out data/booksum
  infini-data encode 's3://bucket/corpus-{000000..000999}.tar' --tokenizer t.model --out data/corpus
  infini-data encode 'pipe:aws s3 cp s3://bucket/corpus-{000..099}.tar -' --tokenizer t.model --out data/corpus
      WebDataset tars; each pipe: is one program, run without a shell
  infini-data encode 'web/*.jsonl.zst' --tokenizer t.model --out data/web --part $SLURM_ARRAY_TASK_ID/8
      one job of a Slurm array 1-8; the one that finishes last puts everything together"""

INSPECT = """\
Print what a dataset holds: counts, lengths, tokenizer and sources; or one document, or the manifest."""
INSPECT_EXAMPLES = """\
examples:
  infini-data inspect data/books/train
  infini-data inspect data/books/train --shard 3 --document 17"""

VERIFY = """\
Compare every file with its hash, and check every document. If something is damaged, name the shard and the document,
and exit with status 1."""
VERIFY_EXAMPLES = """\
examples:
  infini-data verify data/books/train data/books/validation"""

STATS = """\
Print the distribution of document lengths, and the share of the tokens in documents longer than 4K, 32K and 128K."""
STATS_EXAMPLES = """\
examples:
  infini-data stats data/books/train --png lengths.png"""

MERGE = """\
Write several datasets as one, without encoding anything again."""
MERGE_EXAMPLES = """\
examples:
  infini-data merge data/books/train data/web --out data/all --link"""

SPLIT = """\
Write a dataset as two, for training and for validation, without encoding anything again. Whole documents are held out,
the same ones as by encode --holdout."""
SPLIT_EXAMPLES = """\
examples:
  infini-data split data/all --holdout 0.001 --out data/split"""
