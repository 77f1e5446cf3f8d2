"""Test-time adaptation methods of others, written anew from their papers, beside which healing is measured."""
