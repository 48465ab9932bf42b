"""What validation, benchmarks and tests share: the list of cases, the error rule, and scripts that time things.

the list       cases         every case a kernel must hold, as data; a case's string is its identity and its seed
               inputs        tensors with the statistics of Gemma 4
               attention_calls, attention_work    inputs, reference, bytes and operations of an attention case
validation     errors        how far a kernel may be from the reference
               guards        guard bytes around inputs, memory that shows when it is read unwritten
               validation    one case on every backend
benchmarks     timing        rounds, copies, clocks
               ceilings, cards    what the device can do: measured, and by its data sheet
               baselines     SDPA and transformers on the same inputs
               running       from cases to the rows of a record
without a GPU  static        what compiled kernels say, and what must bind them
               sass          reading machine code
               static_tables its tables
records        records       schema, reading, what may not be quoted
               machine       what a record says of the machine
               tables, plot, compare, report    what is made of records
"""
