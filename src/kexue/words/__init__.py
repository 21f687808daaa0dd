"""Counting, word vectors, word discovery and segmentation (numpy and numba; torch is not imported here)."""

from kexue.words.discovery import WordDiscovery as WordDiscovery
from kexue.words.ngrams import NGramCounter as NGramCounter
from kexue.words.segmenter import Segmenter as Segmenter
from kexue.words.tokenizer import Tokenizer as Tokenizer
