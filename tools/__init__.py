"""What users run beside training: `python -m tools.NAME`.

    prepare    build a small real data set, such as the emoji set of `make quickstart`
    export     write a checkpoint as open_clip and transformers load it
    probe      what frozen image features are worth: a linear probe and k-NN
    compare    run the experiments of experiments/, keep their records, show what they found
    bias       how far the estimates of g are from the truth
    imports    draw which file of the project imports which, for docs/

Not here: the method. Nothing in the project imports this folder, except its tests.
"""
